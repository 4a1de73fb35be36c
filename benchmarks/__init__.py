"""Measurements that anyone can repeat. None of them is a test."""
