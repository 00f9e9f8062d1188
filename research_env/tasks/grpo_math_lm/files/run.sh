exec "$PYTHON" train.py
