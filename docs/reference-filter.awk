# awk -f reference-filter.awk HEADER
