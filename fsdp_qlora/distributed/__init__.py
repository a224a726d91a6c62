"""The processes of a run: environment, process group, launch, supervision, signs of life."""
