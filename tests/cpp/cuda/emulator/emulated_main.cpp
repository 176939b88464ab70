// Runs tests on the emulator: a test in which a kernel has a fault fails.
#include <gtest/gtest.h>

#include "emulator.h"

namespace {

class FaultsFail : public testing::EmptyTestEventListener {
  void OnTestEnd(const testing::TestInfo& /*info*/) override {
    for (const emulator::Report& report : emulator::faults()) {
      ADD_FAILURE() << report.text;
    }
    emulator::recover();
  }
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  emulator::set_unwritten_byte(0xa5);  // with which the tests fill memory that a kernel has to write
  testing::UnitTest::GetInstance()->listeners().Append(new FaultsFail);
  return RUN_ALL_TESTS();
}
