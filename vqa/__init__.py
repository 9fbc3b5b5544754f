"""The library behind the scripts. Packages import in one direction only, from left to right:

core -> config -> data -> evaluation, modeling -> inference -> training, reports
"""
