//! Settings by name, each a whole number: as they are stored, sent and shown.
//!
//! `iops-total`, `iops-read`, `iops-write` (requests a second), `bps-total`, `bps-read`, `bps-write` (bytes a second), each with
//! `-max` (the burst rate) and `-max-length` (for how many seconds), and `iops-size` (bytes) are named as in QEMU
//! (`ThrottleLimits` of its QMP reference); `weight` and `reserve-iops` are ours. What is not there, or 0, is not set.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use crate::arbiter::{Settings, WEIGHT_DEFAULT, WEIGHT_MAX};
use crate::limits::{Burst, LimitError, Limits, RATE_MAX, Rate};

/// Names and their values.
pub type Named = BTreeMap<String, u64>;

/// The names of rates.
const RATES: [&str; 6] = ["iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write"];
const MAX: &str = "-max";
const LENGTH: &str = "-max-length";
const SIZE: &str = "iops-size";
const WEIGHT: &str = "weight";
const RESERVE: &str = "reserve-iops";

/// Every name that there is.
pub fn all() -> impl Iterator<Item = String> {
    let rates = RATES.into_iter().flat_map(|rate| ["", MAX, LENGTH].map(|end| format!("{rate}{end}")));
    rates.chain([SIZE, WEIGHT, RESERVE].map(str::to_owned))
}

/// Makes a change: values take the place of those of the same name, and 0 takes a name away, with that of a rate its burst.
pub fn merge(named: &Named, change: &Named) -> Named {
    let mut merged = named.clone();
    for rate in RATES.into_iter().filter(|rate| change.get(*rate) == Some(&0)) {
        merged.remove(&format!("{rate}{MAX}"));
        merged.remove(&format!("{rate}{LENGTH}"));
    }
    merged.extend(change.iter().map(|(name, value)| (name.clone(), *value)));
    merged.retain(|_, value| *value > 0);
    merged
}

impl Settings {
    /// Reads settings.
    ///
    /// # Errors
    /// A name that there is not, a burst without a rate, what [`Limits::check`] refuses.
    pub fn from_named(named: &Named) -> Result<Self, LimitError> {
        if let Some(name) = named.keys().find(|name| !all().any(|known| known == **name)) {
            return Err(LimitError::Unknown {
                name: name.clone(),
                known: all().collect::<Vec<_>>().join(", "),
            });
        }
        let value = |name: &str| named.get(name).copied().filter(|value| *value > 0);
        let rate = |name: &'static str| -> Result<Option<Rate>, LimitError> {
            let (max, length) = (value(&format!("{name}{MAX}")), value(&format!("{name}{LENGTH}")));
            let Some(per_second) = value(name) else {
                return if max.or(length).is_none() { Ok(None) } else { Err(LimitError::Alone { name }) };
            };
            if max.is_none() && length.is_some() {
                return Err(LimitError::NoBurst { name });
            }
            let length = Duration::from_secs(length.unwrap_or(1));
            Ok(Some(Rate { per_second, burst: max.map(|per_second| Burst { per_second, length }) }))
        };
        let [iops_total, iops_read, iops_write, bps_total, bps_read, bps_write] = RATES.map(rate);
        let limits = Limits {
            iops_total: iops_total?,
            iops_read: iops_read?,
            iops_write: iops_write?,
            bps_total: bps_total?,
            bps_read: bps_read?,
            bps_write: bps_write?,
            iops_size: value(SIZE).and_then(NonZeroU64::new),
        };
        limits.check()?;
        let weight = value(WEIGHT).unwrap_or(u64::from(WEIGHT_DEFAULT));
        let weight = u32::try_from(weight).ok().filter(|weight| *weight <= WEIGHT_MAX);
        let reserve_iops = value(RESERVE);
        match (weight, reserve_iops) {
            (None, _) => Err(LimitError::Weight { value: named[WEIGHT] }),
            (_, Some(value)) if value > RATE_MAX => Err(LimitError::Rate { name: RESERVE, value }),
            (Some(weight), reserve_iops) => Ok(Self { limits, weight, reserve_iops }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(pairs: &[(&str, u64)]) -> Named {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    #[test]
    fn each_name_sets_what_it_says() {
        let settings = Settings::from_named(&named(&[
            ("iops-total", 5000),
            ("iops-total-max", 20_000),
            ("iops-total-max-length", 10),
            ("bps-write", 100 << 20),
            ("bps-write-max", 200 << 20),
            ("iops-size", 65_536),
            ("weight", 200),
            ("reserve-iops", 500),
            ("iops-read", 0),
        ]));
        let burst = |per_second, seconds| Some(Burst { per_second, length: Duration::from_secs(seconds) });
        let limits = Limits {
            iops_total: Some(Rate { per_second: 5000, burst: burst(20_000, 10) }),
            bps_write: Some(Rate { per_second: 100 << 20, burst: burst(200 << 20, 1) }),
            iops_size: NonZeroU64::new(65_536),
            ..Limits::default()
        };
        assert_eq!(settings, Ok(Settings { limits, weight: 200, reserve_iops: Some(500) }));
        assert_eq!(Settings::from_named(&Named::new()), Ok(Settings::default()));
        // Each name is taken, and no two for the same.
        let mut seen = vec![Settings::default()];
        for rate in RATES {
            for pairs in [named(&[(rate, 7)]), named(&[(rate, 7), (&format!("{rate}-max"), 9)])] {
                let settings = Settings::from_named(&pairs).unwrap();
                assert!(!seen.contains(&settings), "{rate}");
                seen.push(settings);
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (pairs, why) in [
            (named(&[("iops", 1)]), "iops: there are iops-total, "),
            (named(&[("bps-read-max", 1)]), "bps-read-max without bps-read"),
            (
                named(&[("bps-read", 1), ("bps-read-max-length", 1)]),
                "bps-read-max-length without bps-read-max",
            ),
            (named(&[("iops-read", 10), ("iops-read-max", 9)]), "iops-read-max: 9 is less"),
            (named(&[("iops-read", RATE_MAX + 1)]), "iops-read: "),
            (
                named(&[("iops-read", 1), ("iops-read-max", 1), ("iops-read-max-length", 90_000)]),
                "max-length: ",
            ),
            (named(&[("weight", 10_001)]), "weight: 10001"),
            (named(&[("weight", u64::MAX)]), "weight: "),
            (named(&[("reserve-iops", RATE_MAX + 1)]), "reserve-iops: "),
        ] {
            let error = Settings::from_named(&pairs).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_name() {
        let before = named(&[("iops-total", 5), ("weight", 7)]);
        assert_eq!(
            merge(&before, &named(&[("weight", 0), ("bps-read", 9)])),
            named(&[("iops-total", 5), ("bps-read", 9)])
        );
        let burst = named(&[("iops-total", 5), ("iops-total-max", 7), ("iops-total-max-length", 3)]);
        assert_eq!(merge(&burst, &named(&[("iops-total", 0)])), Named::new());
        assert_eq!(merge(&burst, &named(&[("iops-total", 6)])).len(), 3);
    }
}
