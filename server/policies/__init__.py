"""The policy file, tenants and their keys."""
