"""Where other libraries meet this one, a module each; importing them needs no such library."""
