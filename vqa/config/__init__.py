"""Args files and the dataclasses that they fill: model, data and recipe.

It reads and checks settings. It opens no contest file and loads no model. May import `core`.
"""
