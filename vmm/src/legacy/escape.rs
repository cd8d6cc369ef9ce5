//! The escape of the console: Ctrl-A X ends the machine, Ctrl-A A or Ctrl-A Ctrl-A is a Ctrl-A.

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// What has been typed so far.
#[derive(Debug, Default)]
pub struct Escape {
    /// The last key was Ctrl-A, which has not been passed on yet.
    pending: bool,
}

impl Escape {
    /// Appends to `output` what the guest gets of `input`. Returns true where the user ends the machine; what follows
    /// then goes nowhere.
    pub fn pass(&mut self, input: &[u8], output: &mut Vec<u8>) -> bool {
        for &key in input {
            if !std::mem::take(&mut self.pending) {
                if key == ESCAPE {
                    self.pending = true;
                } else {
                    output.push(key);
                }
                continue;
            }
            match key {
                b'x' | b'X' => return true,
                b'a' | b'A' | ESCAPE => output.push(ESCAPE),
                other => output.extend([ESCAPE, other]),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(typed: &[&[u8]], passed: &[u8], ends: bool) {
        let (mut escape, mut output) = (Escape::default(), Vec::new());
        let ended = typed.iter().any(|keys| escape.pass(keys, &mut output));
        assert_eq!((output.as_slice(), ended), (passed, ends));
    }

    #[test]
    fn what_is_typed() {
        check(&[b"ls\n"], b"ls\n", false);
        check(&[b"a\x01x", b"b"], b"a", true);
        check(&[b"a\x01", b"Xb"], b"a", true);
        check(&[b"\x01\x01x"], b"\x01x", false);
        check(&[b"\x01a", b"\x01A"], b"\x01\x01", false);
        check(&[b"\x01c"], b"\x01c", false);
        check(&[b"\x01"], b"", false);
    }
}
