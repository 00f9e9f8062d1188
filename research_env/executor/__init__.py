"""From an idea to a diff that applies and runs."""
