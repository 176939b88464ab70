"""Writes digits.csv from scikit-learn's copy of the data set.

python examples/data/make_digits.py > examples/data/digits.csv
"""

from sklearn.datasets import load_digits

HEADER = """\
# Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak, 1998,
# UCI Machine Learning Repository, doi:10.24432/C50P49, licence CC BY 4.0.
# As distributed by scikit-learn (sklearn.datasets.load_digits); written by make_digits.py.
# 1797 lines: 64 pixels of an 8x8 image, row by row, 0 to 16; then the digit.\
"""

if __name__ == "__main__":
    digits = load_digits()
    print(HEADER)
    for pixels, label in zip(digits.data, digits.target, strict=True):
        print(",".join(str(int(value)) for value in (*pixels, label)))
