"`python -m fluogen`: the command line, see `fluogen.cli.main`. Written by hand, as `__init__.py` is: it defines nothing."
import sys

from fluogen.cli.main import main

sys.exit(main())
