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
