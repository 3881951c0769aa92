// What the entry files of the families share: functions that the harness calls return null, or what went wrong.
#pragma once

#include <exception>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

namespace {

std::string message;

template <typename Call>
const char* report(Call&& call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
