"""Python on a host of a test that has not come to its end by now shows where it is, once."""

import faulthandler

faulthandler.dump_traceback_later(200)
