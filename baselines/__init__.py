"""Rival decoders on the same backbone as `tidar_ref`: one decoder per file."""
