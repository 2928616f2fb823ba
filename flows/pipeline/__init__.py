"""DVC: running a stage, the order of stages, their results, the lineage of a version, making one again."""
