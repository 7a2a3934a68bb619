"""How the processes of a run hold the parameters of a model: one file for each backend."""
