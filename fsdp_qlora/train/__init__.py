"""The run: ranks are launched, steps are taken, and everything measured is written down."""
