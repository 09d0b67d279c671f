"""`python -m builder`, for a checkout; the console script is `qwen3vl-onnx`."""

from builder.cli.app import main

if __name__ == "__main__":
    main()
