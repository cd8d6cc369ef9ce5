//! The order of versions: the Version Format Specification of the UAPI group, which the Boot Loader Specification
//! refers to, and which agrees with Debian's order on the versions of kernels.

use std::cmp::Ordering;

/// Compares two versions: `6.1.0-9` is less than `6.1.0-10`, and `6.12~rc1` less than `6.12`.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip(a, |byte| !is_known(byte));
        b = skip(b, |byte| !is_known(byte));
        // A pre-release comes before everything, the end included.
        if let Some(order) = separator(&mut a, &mut b, b'~') {
            return order.reverse();
        }
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        for byte in [b'-', b'^', b'.'] {
            if let Some(order) = separator(&mut a, &mut b, byte) {
                return order.reverse();
            }
        }
        let order = if first(a, u8::is_ascii_digit) || first(b, u8::is_ascii_digit) {
            digits(&mut a, &mut b)
        } else {
            letters(&mut a, &mut b)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Compares the names that Debian gives its kernels: there `-rc` stands for a pre-release (as `linux-version` of
/// linux-base has it).
pub fn compare_kernels(a: &str, b: &str) -> Ordering {
    compare(&a.replace("-rc", "~rc"), &b.replace("-rc", "~rc"))
}

fn is_known(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-.~^".contains(byte)
}

fn first(text: &[u8], wanted: impl Fn(&u8) -> bool) -> bool {
    text.first().is_some_and(wanted)
}

fn skip(text: &[u8], unwanted: impl Fn(&u8) -> bool) -> &[u8] {
    let len = text.iter().take_while(|byte| unwanted(byte)).count();
    &text[len..]
}

/// Takes the separator off both; where only one has it, `Greater` says that it is the first.
fn separator(a: &mut &[u8], b: &mut &[u8], byte: u8) -> Option<Ordering> {
    let (in_a, in_b) = (first(a, |found| *found == byte), first(b, |found| *found == byte));
    if in_a != in_b {
        return Some(in_a.cmp(&in_b));
    }
    if in_a {
        (*a, *b) = (&a[1..], &b[1..]);
    }
    None
}

/// Numbers of any length: zeroes in front do not count, then the longer one is the greater.
fn digits(a: &mut &[u8], b: &mut &[u8]) -> Ordering {
    let number = |text: &mut &[u8]| -> Option<Vec<u8>> {
        let rest = skip(text, u8::is_ascii_digit);
        let digits = &text[..text.len() - rest.len()];
        *text = rest;
        (!digits.is_empty()).then(|| skip(digits, |byte| *byte == b'0').to_vec())
    };
    let (a, b) = (number(a), number(b));
    // No number at all is the least.
    let key = |digits: Option<Vec<u8>>| digits.map(|digits| (digits.len(), digits));
    key(a).cmp(&key(b))
}

fn letters(a: &mut &[u8], b: &mut &[u8]) -> Ordering {
    let word = |text: &mut &[u8]| {
        let rest = skip(text, u8::is_ascii_alphabetic);
        let word = text[..text.len() - rest.len()].to_vec();
        *text = rest;
        word
    };
    let (a, b) = (word(a), word(b));
    a.cmp(&b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_specification_hold() {
        // Version Format Specification, section Examples: each line is in ascending order.
        let ascending = [
            &["~1", "", "1"][..],
            &["1~rc", "1", "1.", "11"],
            &["122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1"],
            &["123.a-1", "123.1-1", "123a-1", "124-1"],
            &["6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-18-amd64", "6.12.1"],
            &["1.0", "01.00.1"],
        ];
        for line in ascending {
            for (i, a) in line.iter().enumerate() {
                for (j, b) in line.iter().enumerate() {
                    assert_eq!(compare(a, b), i.cmp(&j), "{a} and {b}");
                }
            }
        }
        assert_eq!(compare("0012", "12"), Ordering::Equal);
        assert_eq!(compare("1_2", "12"), compare("1", "12").then(Ordering::Less));
    }

    #[test]
    fn release_candidates_come_before_releases() {
        assert_eq!(compare_kernels("6.12-rc7-amd64", "6.12-amd64"), Ordering::Less);
        assert_eq!(compare_kernels("6.12-rc7-amd64", "6.11-amd64"), Ordering::Greater);
    }
}
