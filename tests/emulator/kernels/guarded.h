// Calls from Python, which knows no C++ exceptions.
#pragma once
#include <exception>
#include <string>

// Null, or the text of the exception or of the Status.
template <class Call>
const char* guarded(Call call) {
  static std::string text;
  try {
    const char* const status = call();
    if (!status) return nullptr;
    text = status;
  } catch (const std::exception& e) {
    text = e.what();
  }
  return text.c_str();
}
