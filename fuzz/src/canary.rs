//! A planted bug.

/// Panics on one input, which a fuzzer that sees the program's branches finds at once.
///
/// # Panics
/// On `bug`.
pub fn run(data: &[u8]) {
    if data.first() == Some(&b'b') && data.get(1) == Some(&b'u') && data.get(2) == Some(&b'g') {
        panic!("the planted bug");
    }
}
