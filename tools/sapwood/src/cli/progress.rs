//! The bar that shows how far long work has come.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `bytes` of disk on a terminal; nothing elsewhere, or when `quiet`.
pub fn bar(bytes: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {percent}% {bytes}/{total_bytes} {eta}");
    ProgressBar::new(bytes).with_style(style.expect("a template of known keys"))
}

/// Moves a bar whose length is known once the work has begun; where it is not, counts.
pub fn show(bar: &ProgressBar, done: u64, all: u64) {
    if all == 0 && done > 0 {
        bar.set_style(
            ProgressStyle::with_template("{bytes} read and written").expect("a template of known keys"),
        );
        return bar.set_position(done);
    }
    if all == 0 {
        return;
    }
    bar.set_length(all);
    bar.set_position(done);
}
