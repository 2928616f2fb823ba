"""A server that draws registered concepts, many at once, behind OpenAI's image form."""
