// Knows nothing of lomem and torch: they are private to the library.
#include "library/library.h"

int main() {
  return works() ? 0 : 1;
}
