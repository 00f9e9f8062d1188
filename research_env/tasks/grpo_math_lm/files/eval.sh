exec "$PYTHON" -I locked/evaluate.py
