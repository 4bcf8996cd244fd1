#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| memlane_fuzz_targets::hello(bytes));
