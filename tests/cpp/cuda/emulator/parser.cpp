#include <algorithm>
#include <cctype>
#include <cstdio>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "memory.h"
#include "ptx.h"
#include "scanner.h"

namespace emulator {

namespace {

const std::unordered_map<std::string, Type> types = {
    {"pred", Type::pred}, {"u8", Type::u8},   {"s8", Type::s8},       {"b8", Type::b8},        {"u16", Type::u16},
    {"s16", Type::s16},   {"b16", Type::b16}, {"u32", Type::u32},     {"s32", Type::s32},      {"b32", Type::b32},
    {"u64", Type::u64},   {"s64", Type::s64}, {"b64", Type::b64},     {"f16", Type::f16},      {"bf16", Type::bf16},
    {"f32", Type::f32},   {"f64", Type::f64}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}};

// lo, ls, hi and hs are the comparisons of unsigned integers.
const std::unordered_map<std::string, Comparison> comparisons = {
    {"eq", Comparison::eq},   {"ne", Comparison::ne},   {"lt", Comparison::lt},   {"le", Comparison::le},
    {"gt", Comparison::gt},   {"ge", Comparison::ge},   {"lo", Comparison::lt},   {"ls", Comparison::le},
    {"hi", Comparison::gt},   {"hs", Comparison::ge},   {"equ", Comparison::equ}, {"neu", Comparison::neu},
    {"ltu", Comparison::ltu}, {"leu", Comparison::leu}, {"gtu", Comparison::gtu}, {"geu", Comparison::geu},
    {"num", Comparison::num}, {"nan", Comparison::nan}};

const std::unordered_map<std::string, Rounding> roundings = {
    {"rn", Rounding::rn},   {"rz", Rounding::rz},   {"rm", Rounding::rm},   {"rp", Rounding::rp},
    {"rni", Rounding::rni}, {"rzi", Rounding::rzi}, {"rmi", Rounding::rmi}, {"rpi", Rounding::rpi}};

const std::unordered_map<std::string, Special> specials = {
    {"%tid.x", Special::thread},       {"%ntid.x", Special::block_size}, {"%ctaid.x", Special::block},
    {"%nctaid.x", Special::grid_size}, {"%laneid", Special::lane},       {"%warpid", Special::warp}};

enum class Numbers : std::uint8_t { integers, floats, both, bits };

/// An instruction that reads a number of operands, all of its type, and writes one.
struct Form {
  Op op;
  int operands;
  Numbers numbers;
};

const std::unordered_map<std::string, Form> forms = {
    {"add", {Op::add, 2, Numbers::both}},           {"sub", {Op::sub, 2, Numbers::both}},
    {"mul", {Op::mul_lo, 2, Numbers::both}},        {"mul.lo", {Op::mul_lo, 2, Numbers::integers}},
    {"mul.hi", {Op::mul_hi, 2, Numbers::integers}}, {"mul.wide", {Op::mul_wide, 2, Numbers::integers}},
    {"mad.lo", {Op::mad_lo, 3, Numbers::integers}}, {"mad.wide", {Op::mad_wide, 3, Numbers::integers}},
    {"div", {Op::div, 2, Numbers::both}},           {"rem", {Op::rem, 2, Numbers::integers}},
    {"shl", {Op::shl, 2, Numbers::bits}},           {"shr", {Op::shr, 2, Numbers::bits}},
    {"and", {Op::bit_and, 2, Numbers::bits}},       {"or", {Op::bit_or, 2, Numbers::bits}},
    {"xor", {Op::bit_xor, 2, Numbers::bits}},       {"not", {Op::bit_not, 1, Numbers::bits}},
    {"neg", {Op::neg, 1, Numbers::both}},           {"abs", {Op::abs, 1, Numbers::both}},
    {"min", {Op::min, 2, Numbers::both}},           {"max", {Op::max, 2, Numbers::both}},
    {"popc", {Op::popc, 1, Numbers::bits}},         {"bfi", {Op::bfi, 4, Numbers::bits}},
    {"bfe", {Op::bfe, 3, Numbers::integers}},       {"prmt", {Op::prmt, 3, Numbers::bits}},
    {"fma", {Op::fma, 3, Numbers::floats}},         {"rcp", {Op::rcp, 1, Numbers::floats}},
    {"sqrt", {Op::sqrt, 1, Numbers::floats}},       {"ex2", {Op::ex2, 1, Numbers::floats}},
    {"lg2", {Op::lg2, 1, Numbers::floats}},         {"copysign", {Op::copysign, 2, Numbers::floats}}};

struct Declaration {
  std::string name;
  std::int64_t size = 0;
  std::int64_t align = 1;
  std::int64_t element = 1;
};

/// What the names declared between braces hide; nothing, for names that are new.
struct Scope {
  template <class Value>
  using Hidden = std::vector<std::pair<std::string, std::optional<Value>>>;
  Hidden<int> registers;
  Hidden<std::uint64_t> symbols;
};

/// The operation code of a statement: its name, and what follows it after dots.
struct Modifiers {
  std::string full;
  std::string name;
  std::vector<Type> of_type;
  std::set<std::string> others;

  bool take(const std::string& word) {
    return others.erase(word) != 0;
  }
};

class Parser {
 public:
  Parser(const std::string& text, Module& module) : module_(module), scanner_(text) {}

  void run() {
    while (scanner_.skip_blanks()) {
      const std::string word = scanner_.peek();
      if (word == ".version" || word == ".address_size") {
        scanner_.line();
      } else if (word == ".target") {
        std::sscanf(scanner_.line().c_str(), ".target sm_%d", &module_.arch);
      } else if (word == ".file") {
        source_file(scanner_.line());
      } else if (word == ".section") {
        scanner_.until('{');
        scanner_.skip_section();
      } else if (word == ".extern") {
        scanner_.until(';');
      } else if (word == ".visible" || word == ".weak") {
        scanner_.take_word();
      } else if (word == ".entry") {
        scanner_.take_word();
        entry();
      } else if (word == ".global" || word == ".const") {
        variable(scanner_.until(';'));
      } else {
        fail("expected a kernel or a variable, got " + word);
      }
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(module_.name + ":" + std::to_string(scanner_.statement_line()) + ": " + what);
  }

  // Declarations ----------------------------------------------------------------------------------

  void source_file(const std::string& text) {
    unsigned number = 0;
    std::array<char, 4096> name{};
    if (std::sscanf(text.c_str(), ".file %u \"%4095[^\"]\"", &number, name.data()) != 2) {
      return;
    }
    if (module_.files.size() <= number) {
      module_.files.resize(number + 1);
    }
    module_.files[number] = name.data();
  }

  /// ".loc file line column", and where it is inlined: a place that may itself be of an inlined function.
  void location(const std::string& text) {
    std::array<int, 3> at{};
    std::sscanf(text.c_str(), ".loc %d %d %d", &at[0], &at[1], &at[2]);
    source_ = {at[0], at[1]};
    const std::size_t inlined = text.find("inlined_at");
    if (inlined != std::string::npos) {
      std::array<int, 3> call{};
      std::sscanf(text.c_str() + inlined, "inlined_at %d %d %d", &call[0], &call[1], &call[2]);
      inlined_at_[at] = call;
    } else {
      inlined_at_.erase(at);
    }
    constexpr int most_calls =
        100;  // of inlined functions within each other; calls of the same line may look like a cycle
    for (int calls = 0; calls < most_calls && inlined_at_.count(at) != 0; ++calls) {
      at = inlined_at_[at];
    }
    caller_ = {at[0], at[1]};
  }

  /// ".param .align 8 .b8 name[size]" and the like.
  Declaration declaration(const std::string& text) const {
    Declaration result;
    std::int64_t align = 0;
    bool pointer = false;
    std::stringstream words(text);
    for (std::string word; words >> word;) {
      if (word == ".ptr") {
        pointer = true;  // What follows, `.align` too, is of what it points to.
      } else if (word == ".align") {
        std::int64_t bytes = 0;
        words >> bytes;
        align = pointer ? align : bytes;
      } else if (word[0] == '.') {
        const auto type = types.find(word.substr(1));
        if (type != types.end()) {
          result.element = size_of(type->second);
        }
      } else {
        const std::size_t bracket = word.find('[');
        result.name = word.substr(0, bracket);
        const std::int64_t length = bracket == std::string::npos ? 1 : std::atoll(word.c_str() + bracket + 1);
        if (std::count(word.begin(), word.end(), '[') > 1) {
          fail("an array of more than one dimension, " + word);
        }
        result.size = result.element * length;
        break;
      }
    }
    result.align = align != 0 ? align : result.element;
    return result;
  }

  static std::int64_t place(std::int64_t& total, const Declaration& declared) {
    const std::int64_t offset = (total + declared.align - 1) / declared.align * declared.align;
    total = offset + declared.size;
    return offset;
  }

  void variable(const std::string& text) {
    const std::size_t equals = text.find('=');
    const Declaration declared = declaration(text.substr(0, equals));
    std::vector<std::uint8_t> bytes(declared.size);
    if (equals != std::string::npos) {
      const std::string value = stripped(text.substr(equals + 1));
      const std::string inner = value.front() == '{' ? value.substr(1, value.size() - 2) : value;
      auto at = bytes.begin();
      for (const std::string& item : split(inner, ',')) {
        std::uint64_t bits = literal(item);
        for (std::int64_t k = 0; k < declared.element && at != bytes.end(); ++k, bits >>= 8) {
          *at++ = static_cast<std::uint8_t>(bits);
        }
      }
    }
    module_.globals[declared.name] = allocate_variable(bytes);
  }

  void entry() {
    Kernel& kernel = module_.kernels[stripped(scanner_.until('('))];
    kernel_ = &kernel;
    kernel.module = &module_;
    names_.clear();
    constants_.clear();
    labels_.clear();
    branches_.clear();
    symbols_.clear();
    inlined_at_.clear();
    for (const std::string& text : split(scanner_.until(')'), ',')) {
      const Declaration declared = declaration(text);
      symbols_[declared.name] = place(kernel.parameter_bytes, declared);
      kernel.parameters.push_back({static_cast<std::int64_t>(symbols_[declared.name]), declared.size});
    }
    for (scanner_.skip_blanks(); scanner_.next() == '.'; scanner_.skip_blanks()) {
      unsigned x = 1;
      unsigned y = 1;
      unsigned z = 1;
      const std::string text = scanner_.line();
      if (std::sscanf(text.c_str(), ".maxntid %u, %u, %u", &x, &y, &z) >= 1) {
        kernel.max_threads = x * y * z;
      }
    }
    body();
    for (const auto& [index, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) {
        fail("no label " + label);
      }
      kernel.code[index].target = found->second;
    }
    Instruction end;
    end.op = Op::ret;
    end.line = scanner_.statement_line();
    kernel.code.push_back(end);
    kernel.executed.assign(kernel.code.size(), 0);
    kernel.constants.resize(constants_.size() * lanes);
    for (const auto& [bits, index] : constants_) {
      std::fill_n(kernel.constants.begin() + static_cast<std::ptrdiff_t>(index) * lanes, lanes, bits);
    }
  }

  /// Statements between braces; the ones inside are scopes, of calls.
  void body() {
    int depth = 0;
    while (scanner_.skip_blanks()) {
      const char c = scanner_.next();
      const std::string word = scanner_.peek();
      if (c == '{') {
        ++depth;
        scopes_.emplace_back();
        argument_bytes_ = 0;
        scanner_.advance();
      } else if (c == '}') {
        scanner_.advance();
        leave_scope();
        if (--depth == 0) {
          return;
        }
      } else if (c == ';') {
        scanner_.advance();
      } else if (word == ".loc") {
        location(scanner_.line());
      } else if (word.back() == ':') {
        if (!labels_.emplace(word.substr(0, word.size() - 1), static_cast<int>(kernel_->code.size())).second) {
          fail("a second label " + word);
        }
        scanner_.take_word();
      } else if (c == '.') {
        directive(scanner_.until(';'));
      } else {
        statement(stripped(scanner_.until(';')));
      }
    }
    fail("the body of a kernel has no end");
  }

  /// Declares a name in the current scope.
  template <class Names, class Value>
  static void declare(
      Names& names, typename Scope::template Hidden<Value>& hidden, const std::string& name, Value value) {
    const auto found = names.find(name);
    hidden.emplace_back(name, found != names.end() ? std::optional<Value>(found->second) : std::nullopt);
    names[name] = value;
  }
  void declare_symbol(const std::string& name, std::int64_t offset) {
    declare(symbols_, scopes_.back().symbols, name, static_cast<std::uint64_t>(offset));
  }

  /// The names of the scope end, and those that they hid come back.
  void leave_scope() {
    const auto restore = [](auto& names, const auto& hidden) {
      for (auto one = hidden.rbegin(); one != hidden.rend(); ++one) {
        if (one->second) {
          names[one->first] = *one->second;
        } else {
          names.erase(one->first);
        }
      }
    };
    restore(names_, scopes_.back().registers);
    restore(symbols_, scopes_.back().symbols);
    scopes_.pop_back();
  }

  void directive(const std::string& text) {
    const std::string word = text.substr(0, text.find_first_of(" \t"));
    if (word == ".reg") {
      registers(stripped(text.substr(word.size())));
    } else if (word == ".shared" || word == ".local") {
      const Declaration declared = declaration(text);
      declare_symbol(declared.name, place(word == ".shared" ? kernel_->shared_bytes : kernel_->local_bytes, declared));
    } else if (word == ".param") {
      // The arguments of a call lie one after the other.
      const Declaration declared = declaration(text);
      declare_symbol(declared.name, place(argument_bytes_, declared));
    } else if (word != ".pragma") {
      fail("unknown directive " + text);
    }
  }

  /// ".f32 %f<10>" declares %f0 to %f9.
  void registers(const std::string& text) {
    const std::size_t space = text.find_first_of(" \t");
    const auto known = types.find(text.substr(1, space - 1));
    if (known == types.end()) {
      fail("unknown type of registers, " + text);
    }
    const Type type = known->second;
    for (const std::string& name : split(text.substr(space), ',')) {
      const std::size_t angle = name.find('<');
      const int count = angle == std::string::npos ? 1 : std::atoi(name.c_str() + angle + 1);
      for (int k = 0; k < count; ++k) {
        const std::string full = angle == std::string::npos ? name : name.substr(0, angle) + std::to_string(k);
        declare(names_, scopes_.back().registers, full, static_cast<int>(kernel_->registers.size()));
        kernel_->registers.push_back(type);
      }
    }
  }

  // Operands --------------------------------------------------------------------------------------

  std::uint64_t literal(const std::string& text) const {
    if (text.size() > 2 && text[0] == '0' && std::string_view("fFdD").find(text[1]) != std::string_view::npos) {
      return std::strtoull(text.c_str() + 2, nullptr, 16);
    }
    char* end = nullptr;
    const std::uint64_t bits = text.front() == '-' ? static_cast<std::uint64_t>(std::strtoll(text.c_str(), &end, 0))
                                                   : std::strtoull(text.c_str(), &end, 0);
    if (*end != '\0' && std::string_view(end) != "U") {
      fail("expected a number, got " + text);
    }
    return bits;
  }

  Operand constant(std::uint64_t bits) {
    return {true, constants_.emplace(bits, static_cast<int>(constants_.size())).first->second};
  }

  Operand operand(const std::string& text, Type type) {
    if (text == "_") {
      return {};
    }
    if (const auto found = names_.find(text); found != names_.end()) {
      return {false, found->second};
    }
    if (const auto found = symbols_.find(text); found != symbols_.end()) {
      return constant(found->second);
    }
    if (const auto found = module_.globals.find(text); found != module_.globals.end()) {
      return constant(found->second);
    }
    if (std::isdigit(static_cast<unsigned char>(text[0])) == 0 && text[0] != '-') {
      fail("unknown operand " + text);
    }
    const std::uint64_t bits = literal(text);
    const int bytes = size_of(type);
    return constant(bytes < 8 ? bits & ((std::uint64_t{1} << (8 * bytes)) - 1) : bits);
  }

  /// "[base+offset]".
  void address(const std::string& text, Instruction& i) {
    if (text.size() < 3 || text.front() != '[' || text.back() != ']') {
      fail("expected an address, got " + text);
    }
    const std::string inner = text.substr(1, text.size() - 2);
    const std::size_t plus = inner.find('+');
    i.offset = plus == std::string::npos ? 0 : std::strtoll(inner.c_str() + plus + 1, nullptr, 0);
    i.operand[i.operands++] = operand(stripped(inner.substr(0, plus)), Type::b64);
  }

  /// The registers of "{a, b}", or a single one.
  static std::vector<std::string> tuple(const std::string& text) {
    if (text.front() != '{') {
      return {text};
    }
    return split(text.substr(1, text.size() - 2), ',');
  }

  // Instructions ----------------------------------------------------------------------------------

  void statement(std::string text) {
    Instruction i;
    i.line = scanner_.statement_line();
    i.source = source_;
    i.caller = caller_;
    if (text[0] == '@') {
      const std::size_t space = text.find_first_of(" \t");
      i.predicate_negated = text[1] == '!';
      const std::string name = text.substr(i.predicate_negated ? 2 : 1, space - (i.predicate_negated ? 2 : 1));
      if (names_.count(name) == 0) {
        fail("unknown predicate " + name);
      }
      i.predicate = names_.at(name);
      text = stripped(text.substr(space));
    }
    const std::size_t space = std::min(text.find_first_of(" \t\r\n"), text.size());
    Modifiers modifiers = modifiers_of(text.substr(0, space), i);
    const std::vector<std::string> operands = split(text.substr(space), ',');
    i.type = modifiers.of_type.empty() ? Type::none : modifiers.of_type[0];
    i.operand_type = modifiers.of_type.size() > 1 ? modifiers.of_type[1] : i.type;
    if (!simple(i, modifiers, operands)) {
      special(i, modifiers, operands);
    }
    if (!modifiers.others.empty()) {
      fail("unknown modifier ." + *modifiers.others.begin() + " of " + modifiers.full);
    }
    if (i.approximate && i.op != Op::ex2 && i.op != Op::rcp && i.op != Op::lg2) {
      fail("approximate " + modifiers.full);
    }
    if (i.ftz && !i.approximate) {
      fail(".ftz of an exact instruction, " + modifiers.full);
    }
    if (i.saturated && !(i.op == Op::cvt && i.type == Type::f32 && is_float(i.operand_type))) {
      fail(".sat of " + modifiers.full);
    }
    if (i.rounding != Rounding::none && i.rounding != Rounding::rn && i.op != Op::fma && i.op != Op::cvt) {
      fail("rounding of " + modifiers.full);
    }
    kernel_->code.push_back(i);
  }

  Modifiers modifiers_of(const std::string& full, Instruction& i) const {
    Modifiers result;
    result.full = full;
    std::vector<std::string> parts = split(full, '.');
    result.name = parts[0];
    for (auto part = parts.begin() + 1; part != parts.end(); ++part) {
      if (const auto type = types.find(*part); type != types.end()) {
        result.of_type.push_back(type->second);
      } else if (const auto rounding = roundings.find(*part); rounding != roundings.end()) {
        i.rounding = rounding->second;
      } else {
        result.others.insert(*part);
      }
    }
    i.ftz = result.take("ftz");
    i.saturated = result.take("sat");
    i.approximate = result.take("approx");
    return result;
  }

  /// Whether an instruction computes with numbers of a type.
  static bool takes(Numbers numbers, Type type) {
    const bool number = type == Type::f32 || type == Type::f64;
    const bool packed = type == Type::f16x2 || type == Type::bf16x2;
    if (number) {
      return numbers == Numbers::floats || numbers == Numbers::both;
    }
    if (is_float(type) || packed || type == Type::none) {
      return false;
    }
    return numbers != Numbers::floats;
  }

  bool simple(Instruction& i, Modifiers& modifiers, const std::vector<std::string>& operands) {
    std::string name = modifiers.name;
    for (const char* part : {"lo", "hi", "wide"}) {
      if ((name == "mul" || name == "mad") && modifiers.take(part)) {
        name += std::string(".") + part;
      }
    }
    const auto found = forms.find(name);
    if (found == forms.end()) {
      return false;
    }
    const Form& form = found->second;
    if (!takes(form.numbers, i.type) || modifiers.of_type.size() != 1) {
      fail("unknown type of " + modifiers.full);
    }
    if (static_cast<int>(operands.size()) != form.operands + 1) {
      fail("expected other operands of " + modifiers.full);
    }
    const bool needs_part = name == "mul" && !is_float(i.type);  // .lo, .hi or .wide
    const bool approximate = form.op == Op::ex2 || form.op == Op::lg2;
    if (needs_part || (approximate && (!i.approximate || i.type != Type::f32))) {
      fail("unknown instruction " + modifiers.full);
    }
    if (form.op == Op::sqrt && i.approximate) {
      fail("approximate " + modifiers.full);
    }
    if (form.op == Op::fma && i.rounding == Rounding::none) {
      fail(modifiers.full + " has no rounding");
    }
    if (form.op == Op::div && i.type == Type::f32 && modifiers.take("full")) {
      fail("approximate " + modifiers.full);
    }
    i.op = form.op;
    result(i, operands[0], i.type);
    for (int k = 0; k < form.operands; ++k) {
      // Counts of bits and positions are of 32 bits; the sum of a wide product is of the product's size.
      const bool count = (i.op == Op::shl || i.op == Op::shr) && k == 1;
      const bool position = (i.op == Op::bfe && k > 0) || (i.op == Op::bfi && k > 1);
      const bool sum = i.op == Op::mad_wide && k == 2;
      source(i, operands[k + 1], count || position ? Type::u32 : sum ? Type::b64 : i.type);
    }
    return true;
  }

  void result(Instruction& i, const std::string& text, Type type) {
    if (i.results >= i.result.size() || (text == "_" && i.op != Op::unpack && i.op != Op::ld)) {
      fail("a result that cannot be, " + text);
    }
    const Operand operand_of = operand(text, type);
    if (operand_of.constant) {
      fail("expected a register, got " + text);
    }
    i.result[i.results++] = operand_of;
  }
  void source(Instruction& i, const std::string& text, Type type) {
    if (i.operands >= i.operand.size() || text == "_") {
      fail("an operand that cannot be, " + text);
    }
    i.operand[i.operands++] = operand(text, type);
  }

  void special(Instruction& i, Modifiers& modifiers, const std::vector<std::string>& operands) {
    const std::string& name = modifiers.name;
    const auto expect = [&](std::size_t count) {
      if (operands.size() != count) {
        fail("expected other operands of " + modifiers.full);
      }
    };
    if (name == "mov") {
      expect(2);
      move(i, operands);
    } else if (name == "cvta") {
      // Generic addresses are those of global memory.
      modifiers.take("to");
      if (!modifiers.take("global")) {
        fail("generic address of another space, " + modifiers.full);
      }
      expect(2);
      i.op = Op::cvta;
      result(i, operands[0], i.type);
      source(i, operands[1], i.type);
    } else if (name == "setp" || name == "set") {
      expect(3);
      comparison(i, modifiers, operands);
    } else if (name == "selp") {
      expect(4);
      i.op = Op::selp;
      result(i, operands[0], i.type);
      source(i, operands[1], i.type);
      source(i, operands[2], i.type);
      source(i, operands[3], Type::pred);
    } else if (name == "cvt") {
      expect(2);
      conversion(i, modifiers, operands);
    } else if (name == "ld" || name == "st") {
      expect(2);
      access(i, modifiers, operands);
    } else if (name == "shfl") {
      shuffle(i, modifiers, operands);
    } else if (name == "bar" || name == "barrier") {
      modifiers.take("cta");
      if (!modifiers.take("sync") || operands != std::vector<std::string>{"0"}) {
        fail("expected bar.sync 0");
      }
      i.op = Op::bar;
    } else if (name == "bra") {
      modifiers.take("uni");
      expect(1);
      i.op = Op::bra;
      branches_.emplace_back(kernel_->code.size(), operands[0]);
    } else if (name == "ret" || name == "exit") {
      modifiers.take("uni");
      i.op = Op::ret;
    } else if (name == "trap") {
      i.op = Op::trap;
    } else if (name == "call") {
      modifiers.take("uni");
      if (std::find(operands.begin(), operands.end(), "__assertfail") == operands.end()) {
        fail("call of another function than __assertfail");
      }
      i.op = Op::call;
    } else {
      fail("unknown instruction " + modifiers.full);
    }
  }

  void move(Instruction& i, const std::vector<std::string>& operands) {
    const int bytes = size_of(i.type);
    const auto part = [&](std::size_t parts) {
      const auto size = static_cast<std::size_t>(bytes) / parts;
      return size == 1 ? Type::b8 : size == 2 ? Type::b16 : Type::b32;
    };
    if (operands[0].front() == '{') {
      i.op = Op::unpack;
      source(i, operands[1], i.type);
      for (const std::string& name : tuple(operands[0])) {
        result(i, name, part(tuple(operands[0]).size()));
      }
    } else if (operands[1].front() == '{') {
      i.op = Op::pack;
      result(i, operands[0], i.type);
      for (const std::string& name : tuple(operands[1])) {
        source(i, name, part(tuple(operands[1]).size()));
      }
    } else if (const auto found = specials.find(operands[1]); found != specials.end()) {
      i.op = Op::special;
      i.special = found->second;
      result(i, operands[0], i.type);
    } else {
      i.op = Op::mov;
      result(i, operands[0], i.type);
      source(i, operands[1], i.type);
    }
  }

  void comparison(Instruction& i, Modifiers& modifiers, const std::vector<std::string>& operands) {
    const bool predicate = modifiers.name == "setp";
    bool found = false;
    for (const auto& [word, value] : comparisons) {
      if (modifiers.take(word)) {
        i.comparison = value;
        found = true;
      }
    }
    const bool packed = i.operand_type == Type::f16x2 || i.operand_type == Type::bf16x2;
    const bool known = predicate ? takes(Numbers::both, i.operand_type) : packed && i.type == Type::u32;
    if (!found || !known) {
      fail("unknown comparison " + modifiers.full);
    }
    i.op = predicate ? Op::setp : Op::set;
    result(i, operands[0], predicate ? Type::pred : i.type);
    source(i, operands[1], i.operand_type);
    source(i, operands[2], i.operand_type);
  }

  void conversion(Instruction& i, Modifiers& modifiers, const std::vector<std::string>& operands) {
    if (modifiers.of_type.size() != 2) {
      fail("unknown conversion " + modifiers.full);
    }
    const bool to_half = i.type == Type::f16 || i.type == Type::bf16;
    const bool from_half = i.operand_type == Type::f16 || i.operand_type == Type::bf16;
    const bool integral = i.rounding >= Rounding::rni;
    const bool packed = i.type == Type::f16x2 || i.type == Type::bf16x2 || i.operand_type == Type::f16x2 ||
                        i.operand_type == Type::bf16x2;
    const bool to_integer = is_float(i.operand_type) && !is_float(i.type);
    const bool narrows =
        (i.operand_type == Type::f64 && i.type == Type::f32) || (!is_float(i.operand_type) && is_float(i.type));
    const bool rounding_known = integral             ? is_float(i.operand_type)
                                : narrows || to_half ? i.rounding == Rounding::rn
                                                     : i.rounding == Rounding::none && !to_integer;
    const bool known = !packed && i.type != Type::pred && i.operand_type != Type::pred &&
                       (!to_half || i.operand_type == Type::f32) && !(from_half && to_half) && rounding_known;
    if (!known) {
      fail("unknown conversion " + modifiers.full);
    }
    i.op = Op::cvt;
    result(i, operands[0], i.type);
    i.register_bytes = static_cast<std::uint8_t>(size_of(kernel_->registers[i.result[0].index]));
    source(i, operands[1], i.operand_type);
  }

  void access(Instruction& i, Modifiers& modifiers, const std::vector<std::string>& operands) {
    const bool load = modifiers.name == "ld";
    i.read_only = load && modifiers.take("nc");
    modifiers.take("wb");
    static const std::unordered_map<std::string, Space> spaces = {
        {"global", Space::global}, {"shared", Space::shared}, {"local", Space::local}, {"param", Space::param}};
    for (const auto& [word, space] : spaces) {
      if (modifiers.take(word)) {
        i.space = space;
      }
    }
    if (modifiers.take("v2")) {
      i.vector = 2;
    }
    if (modifiers.take("v4")) {
      i.vector = 4;
    }
    if (size_of(i.type) * i.vector > 16) {
      fail("expected at most 16 bytes, " + modifiers.full);
    }
    const std::vector<std::string> values = tuple(operands[load ? 0 : 1]);
    if (values.size() != i.vector) {
      fail("expected a vector of another length, " + modifiers.full);
    }
    if (!load && i.space == Space::param) {
      i.op = Op::argument;
      address(operands[0], i);
      source(i, values[0], i.type);
      return;
    }
    i.op = load ? Op::ld : Op::st;
    address(operands[load ? 1 : 0], i);
    for (const std::string& value : values) {
      if (load) {
        result(i, value, i.type);
      } else {
        source(i, value, i.type);
      }
    }
  }

  void shuffle(Instruction& i, Modifiers& modifiers, const std::vector<std::string>& operands) {
    static const std::unordered_map<std::string, Shuffle> shuffles = {
        {"up", Shuffle::up}, {"down", Shuffle::down}, {"bfly", Shuffle::bfly}, {"idx", Shuffle::idx}};
    bool found = false;
    for (const auto& [word, value] : shuffles) {
      if (modifiers.take(word)) {
        i.shuffle = value;
        found = true;
      }
    }
    if (!modifiers.take("sync") || !found || operands.size() != 5) {
      fail("unknown shuffle " + modifiers.full);
    }
    i.op = Op::shfl;
    const std::vector<std::string> results = split(operands[0], '|');
    result(i, results[0], i.type);
    if (results.size() > 1) {
      result(i, results[1], Type::pred);
    }
    source(i, operands[1], i.type);
    for (int k = 2; k < 5; ++k) {
      source(i, operands[k], Type::u32);
    }
  }

  Module& module_;
  Scanner scanner_;
  Place source_;
  Place caller_;
  std::map<std::array<int, 3>, std::array<int, 3>>
      inlined_at_;  // file, line and column of calls: where they are inlined
  Kernel* kernel_ = nullptr;
  std::int64_t argument_bytes_ = 0;
  std::unordered_map<std::string, int> names_;
  std::vector<Scope> scopes_;
  std::unordered_map<std::uint64_t, int> constants_;
  std::unordered_map<std::string, int> labels_;
  std::vector<std::pair<std::size_t, std::string>> branches_;
  std::unordered_map<std::string, std::uint64_t> symbols_;  // parameters, shared and local arrays: their offsets
};

}  // namespace

void parse(const std::string& text, const std::string& name, Module& module) {
  module.name = name;
  Parser(text, module).run();
  for (auto& [kernel_name, kernel] : module.kernels) {
    kernel.name = kernel_name;
  }
}

}  // namespace emulator
