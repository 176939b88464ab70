#include "scanner.h"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <utility>

namespace emulator {

std::string stripped(std::string_view text) {
  const auto blank = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
  const auto begin = std::find_if_not(text.begin(), text.end(), blank);
  const auto end = std::find_if_not(text.rbegin(), std::make_reverse_iterator(begin), blank).base();
  return {begin, end};
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[' || c == '(') {
      ++depth;
    }
    if (c == '}' || c == ']' || c == ')') {
      --depth;
    }
    if (c == separator && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  std::transform(parts.begin(), parts.end(), parts.begin(), stripped);
  if (parts.back().empty()) {
    parts.pop_back();
  }
  return parts;
}

namespace {

/// Comments become blanks, so that lines keep their numbers.
std::string without_comments(std::string text) {
  for (std::size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '"') {
      i = std::min(text.find('"', i + 1), text.size());
    } else if (text[i] == '/' && text[i + 1] == '/') {
      for (; i < text.size() && text[i] != '\n'; ++i) {
        text[i] = ' ';
      }
    } else if (text[i] == '/' && text[i + 1] == '*') {
      const std::size_t end = std::min(text.find("*/", i), text.size() - 2) + 2;
      std::replace_if(text.begin() + i, text.begin() + end, [](char c) { return c != '\n'; }, ' ');
      i = end - 1;
    }
  }
  return text;
}

}  // namespace

Scanner::Scanner(std::string text) : text_(without_comments(std::move(text))) {}

void Scanner::advance() {
  if (text_[at_++] == '\n') {
    ++line_;
  }
}

bool Scanner::skip_blanks() {
  while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
    advance();
  }
  statement_line_ = line_;
  return at_ < text_.size();
}

std::string Scanner::peek() const {
  const std::size_t end = std::min(text_.find_first_of(" \t\r\n(;", at_), text_.size());
  return text_.substr(at_, end - at_);
}

void Scanner::take_word() {
  for (std::size_t rest = peek().size(); rest > 0; --rest) {
    advance();
  }
}

std::string Scanner::until(char stop) {
  std::string result;
  for (; at_ < text_.size() && text_[at_] != stop; advance()) {
    result += text_[at_];
  }
  if (at_ < text_.size()) {
    advance();
  }
  return result;
}

void Scanner::skip_section() {
  for (int depth = 1; depth > 0 && at_ < text_.size(); advance()) {
    if (text_[at_] == '{') {
      ++depth;
    }
    if (text_[at_] == '}') {
      --depth;
    }
  }
}

}  // namespace emulator
