"""The report of a run: one HTML page that says what happened in it, also while it is running.

run_data.py reads the run's folder, figures.py and tables.py turn what was read into plots and tables, page.py
puts them on the page. Only run_data.py reads the bucket; the others are pure.
"""
