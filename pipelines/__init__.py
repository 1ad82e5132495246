"""The DAG and how its stages run on Ray. The only room that imports ray."""
