"""What the scripts share: one flat module a role. Modules never import a script."""
