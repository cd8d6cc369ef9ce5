//! Sizes as people write them.

use std::str::FromStr;

/// A number of bytes, such as `10G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// A new size, or a difference, such as `+1G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes.
    To(u64),
    /// This many more.
    Grow(u64),
    /// This many fewer.
    Shrink(u64),
}

/// Suffixes, each 1024 times the one before.
const SUFFIXES: &str = "KMGTPE";

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, suffix) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let suffix = suffix.to_ascii_uppercase();
        let shift = match suffix.strip_suffix("IB").unwrap_or(&suffix) {
            "" | "B" if !suffix.ends_with("IB") => Some(0),
            letter if letter.len() == 1 => SUFFIXES.find(letter).map(|i| 10 * (i as u32 + 1)),
            _ => None,
        };
        let number = digits.parse::<u64>().ok();
        let bytes = number.zip(shift).and_then(|(n, shift)| n.checked_mul(1 << shift));
        bytes.filter(|n| i64::try_from(*n).is_ok()).map(Self).ok_or_else(|| {
            "a size is a whole number of bytes, or of KiB, MiB, GiB, TiB, PiB, EiB with the suffix K, M, G, \
             T, P, E; for example 10G"
                .to_owned()
        })
    }
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = |text: &str| text.parse().map(|Size(n)| n);
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => size(more).map(Self::Grow),
            (_, Some(less)) => size(less).map(Self::Shrink),
            _ => size(text).map(Self::To),
        }
    }
}

impl NewSize {
    /// The size that results from `old`; `None` when there is no such size.
    pub fn from(self, old: u64) -> Option<u64> {
        match self {
            Self::To(size) => Some(size),
            Self::Grow(more) => old.checked_add(more),
            Self::Shrink(less) => old.checked_sub(less),
        }
    }
}

/// A size with its number of bytes, such as `1.5 GiB (1610612736 bytes)`.
pub fn display(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", short(bytes))
}

/// A size in three digits, such as `1.5 GiB`.
pub fn short(bytes: u64) -> String {
    let mut unit = "B".to_owned();
    let mut value = bytes as f64;
    for letter in SUFFIXES.chars() {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = format!("{letter}iB");
    }
    // Three digits, without zeroes that say nothing.
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    let number = format!("{value:.decimals$}");
    let number = if decimals > 0 { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let bytes = |text: &str| text.parse().ok().map(|Size(n)| n);
        assert_eq!(bytes("512"), Some(512));
        assert_eq!(bytes("4k"), Some(4096));
        assert_eq!(bytes("10G"), Some(10 << 30));
        assert_eq!(bytes("10GiB"), Some(10 << 30));
        assert_eq!(bytes("7E"), Some(7 << 60));
        for bad in
            ["", "G", "-1", "+1", "1.5G", "1X", "1GB", "1IB", "1G1", "8E", "99999999999999999999", "1é"]
        {
            assert_eq!(bytes(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn differences_are_read() {
        let new = |text: &str| text.parse::<NewSize>().ok().and_then(|size| size.from(4096));
        assert_eq!(new("1M"), Some(1 << 20));
        assert_eq!(new("+4K"), Some(8192));
        assert_eq!(new("-4K"), Some(0));
        assert_eq!(new("-8K"), None);
    }

    #[test]
    fn sizes_are_shown() {
        assert_eq!(short(0), "0 B");
        assert_eq!(short(512), "512 B");
        assert_eq!(short(10 << 30), "10 GiB");
        assert_eq!(short(3 << 29), "1.5 GiB");
        assert_eq!(display(331_776), "324 KiB (331776 bytes)");
    }
}
