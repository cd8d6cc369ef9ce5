//! Options that say what a guest may do.

use std::str::FromStr;

use clap::Args;
use sapwood_qos::arbiter::Settings;
use sapwood_qos::names::Named;

use super::size::{self, Size};
use crate::control::wire::Failure;

/// What a guest may do; 0 takes a limit away.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Limits")]
pub struct LimitOptions {
    /// Requests a second
    #[arg(long, alias = "iops-total", value_name = "N")]
    iops: Option<u64>,

    /// Reads a second
    #[arg(long, value_name = "N")]
    iops_read: Option<u64>,

    /// Writes a second
    #[arg(long, value_name = "N")]
    iops_write: Option<u64>,

    /// Bytes a second, for example 100M
    #[arg(long, alias = "bps-total", value_name = "SIZE")]
    bps: Option<Size>,

    /// Bytes read a second
    #[arg(long, value_name = "SIZE")]
    bps_read: Option<Size>,

    /// Bytes written a second
    #[arg(long, value_name = "SIZE")]
    bps_write: Option<Size>,

    /// Requests a second for a while, after doing less
    #[arg(long, alias = "iops-total-max", value_name = "N")]
    burst_iops: Option<u64>,

    /// Reads a second for a while
    #[arg(long, alias = "iops-read-max", value_name = "N")]
    burst_iops_read: Option<u64>,

    /// Writes a second for a while
    #[arg(long, alias = "iops-write-max", value_name = "N")]
    burst_iops_write: Option<u64>,

    /// Bytes a second for a while
    #[arg(long, alias = "bps-total-max", value_name = "SIZE")]
    burst_bps: Option<Size>,

    /// Bytes read a second for a while
    #[arg(long, alias = "bps-read-max", value_name = "SIZE")]
    burst_bps_read: Option<Size>,

    /// Bytes written a second for a while
    #[arg(long, alias = "bps-write-max", value_name = "SIZE")]
    burst_bps_write: Option<Size>,

    /// For how long the bursts named here last after enough idling; 1 if not given
    #[arg(long, value_name = "SECONDS")]
    burst_seconds: Option<u64>,

    /// A request of more bytes than this counts as several
    #[arg(long, value_name = "SIZE")]
    iops_size: Option<Size>,

    /// Its part of what all can do together, among those that want something: 1 to 10000, 100 if not given
    #[arg(long, value_name = "N")]
    weight: Option<u64>,

    /// Requests a second that it gets in any case
    #[arg(long, value_name = "N")]
    reserve_iops: Option<u64>,

    /// Any of these by its name in QEMU, such as iops-read-max-length=5
    #[arg(long, value_name = "NAME=N")]
    set: Vec<Setting>,
}

/// A name and a number.
#[derive(Clone, Debug)]
struct Setting(String, u64);

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=').and_then(|(name, value)| Some((name, value.parse().ok()?)));
        let (name, value) = parts.ok_or("write NAME=N, where N is a whole number")?;
        Ok(Self(name.to_owned(), value))
    }
}

impl LimitOptions {
    /// What was given, by name.
    pub fn named(&self) -> anyhow::Result<Named> {
        let size = |size: &Option<Size>| size.map(|Size(bytes)| bytes);
        let rates = [
            ("iops-total", self.iops, self.burst_iops),
            ("iops-read", self.iops_read, self.burst_iops_read),
            ("iops-write", self.iops_write, self.burst_iops_write),
            ("bps-total", size(&self.bps), size(&self.burst_bps)),
            ("bps-read", size(&self.bps_read), size(&self.burst_bps_read)),
            ("bps-write", size(&self.bps_write), size(&self.burst_bps_write)),
        ];
        let mut named = Named::new();
        let mut put = |name: String, value: Option<u64>| {
            named.extend(value.map(|value| (name, value)));
        };
        for (rate, value, burst) in rates {
            put(rate.to_owned(), value);
            put(format!("{rate}-max"), burst);
            put(format!("{rate}-max-length"), burst.and(self.burst_seconds));
        }
        put("iops-size".to_owned(), size(&self.iops_size));
        put("weight".to_owned(), self.weight);
        put("reserve-iops".to_owned(), self.reserve_iops);
        for Setting(name, value) in &self.set {
            put(name.clone(), Some(*value));
        }
        if self.burst_seconds.is_some() && !rates.iter().any(|(.., burst)| burst.is_some()) {
            let text =
                "--burst-seconds says how long bursts last that are named with it, such as --burst-iops";
            return Err(Failure::new("invalid", text).into());
        }
        Ok(named)
    }

    /// The same for a disk of which nothing was said before.
    pub fn settings(&self) -> anyhow::Result<Settings> {
        Settings::from_named(&self.named()?)
            .map_err(|error| Failure::new("invalid", error.to_string()).into())
    }
}

/// What was said, in one line.
pub fn line(named: &Named) -> String {
    let pairs: Vec<String> = named.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if pairs.is_empty() { "no limits".to_owned() } else { pairs.join(" ") }
}

/// What was said, for a line with other things: rates with their bursts, as in `iops 5000/20000`.
pub fn short(named: &Named) -> String {
    let number = |name: &str, value: u64| match name.starts_with("bps") || name == "iops-size" {
        true => size::short(value),
        false => value.to_string(),
    };
    let is_burst = |name: &str| name.ends_with("-max") || name.ends_with("-max-length");
    let rates = named.iter().filter(|(name, _)| !is_burst(name)).map(|(name, value)| {
        let burst = named.get(&format!("{name}-max"));
        let burst = burst.map(|burst| format!("/{}", number(name, *burst))).unwrap_or_default();
        format!("{} {}{burst}", name.strip_suffix("-total").unwrap_or(name), number(name, *value))
    });
    rates.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitOptions,
    }

    fn named(line: &str) -> anyhow::Result<Named> {
        Line::try_parse_from(std::iter::once("x").chain(line.split_whitespace()))?.limits.named()
    }

    #[test]
    fn options_mean_names() {
        let given = "--iops 5000 --burst-iops 20000 --burst-seconds 10 --bps-write 100M --weight 200 --reserve-iops 500";
        assert_eq!(
            line(&named(given).unwrap()),
            "bps-write=104857600 iops-total=5000 iops-total-max=20000 iops-total-max-length=10 reserve-iops=500 weight=200"
        );
        assert_eq!(
            short(&named(given).unwrap()),
            "bps-write 100 MiB, iops 5000/20000, reserve-iops 500, weight 200"
        );
        assert_eq!(
            named("--iops-total 5 --iops-total-max 9").unwrap(),
            named("--iops 5 --burst-iops 9").unwrap()
        );
        assert_eq!(
            line(&named("--set bps-read-max-length=3 --iops 0").unwrap()),
            "bps-read-max-length=3 iops-total=0"
        );
        assert!(named("--burst-seconds 3 --iops 5").is_err());
        assert!(named("--set weight").is_err());
        assert_eq!(line(&named("").unwrap()), "no limits");
    }
}
