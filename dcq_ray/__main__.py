"""`python -m dcq_ray`: the command line."""

from dcq_ray.cli import main

if __name__ == "__main__":
    main()
