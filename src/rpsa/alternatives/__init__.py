"""What one could do instead of freezing: the methods that RPSA is to be measured against."""
