// The text of a module, read from its beginning to its end.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace emulator {

/// The text without leading and trailing blanks.
std::string stripped(std::string_view text);

/// Splits a text at the separators outside of brackets, and strips the parts.
std::vector<std::string> split(std::string_view text, char separator);

class Scanner {
 public:
  explicit Scanner(std::string text);

  /// Goes to the next character that is not blank. Returns false at the end.
  bool skip_blanks();
  char next() const {
    return text_[at_];
  }
  /// The word that begins here, up to a blank, a bracket or a semicolon.
  std::string peek() const;
  void take_word();
  void advance();
  /// The text up to a character, which is skipped.
  std::string until(char stop);
  std::string line() {
    return until('\n');
  }
  /// Skips what is between braces, of which the first has been read.
  void skip_section();

  /// Number of the line where the last blanks ended.
  int statement_line() const {
    return statement_line_;
  }

 private:
  std::string text_;
  std::size_t at_ = 0;
  int line_ = 1;
  int statement_line_ = 1;
};

}  // namespace emulator
