"""How the cases of each golden file of a method are run."""
