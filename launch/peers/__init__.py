"""Other frameworks doing the same job, to be measured beside dtrain. Each file runs alone, in its own interpreter."""
