import sys

from engine.supervise.options import options

if __name__ == "__main__":
    args = options(__doc__)

    from engine.supervise.supervisor import supervise

    sys.exit(supervise(args))
