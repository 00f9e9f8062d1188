exec "$PYTHON" -S train.py
