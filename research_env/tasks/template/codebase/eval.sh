exec "$PYTHON" -I -S locked/evaluate.py
