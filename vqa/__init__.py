"""The library behind the scripts. Packages import in one direction only, from left to right:

core -> config -> data -> evaluation, modeling -> inference -> training, reports
"""

import logging

# On a CPU, bitsandbytes warns at import that a kernel for 4 bits is missing; 4 bits need a GPU here anyway.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
