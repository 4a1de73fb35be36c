"""Networks, the teacher, weight files. Imports torch only."""
