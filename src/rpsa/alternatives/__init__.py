"""Alternatives to freezing: the methods that RPSA is to be measured against."""
