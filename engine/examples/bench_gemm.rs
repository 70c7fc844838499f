//! The engine's f32 matrix product beside that of the `gemm` crate, on the shapes of SmolLM2-135M.
//!
//!     cargo run --release --example bench_gemm [REPETITIONS] [FILTER]
//!
//! Both run by turns in one process, on all threads; of each the median counts.

use std::time::Instant;

use gemm::Parallelism;
use tunesmith_engine::measure::{Layout, product};

/// Inputs and outputs of the projections: q, k and v; output; gate and up; down; LoRA's; the head.
const PROJECTIONS: [(usize, usize); 7] =
    [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 48), (576, 16), (576, 49_152)];
const TOKENS: [usize; 3] = [1024, 256, 64];
/// The head goes through its rows in chunks of this many.
const HEAD_ROWS: usize = 256;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let repetitions: usize =
        arguments.next().map_or(7, |text| text.parse().expect("a number of repetitions"));
    let filter = arguments.next().unwrap_or_default();
    let mut totals = [0.0; 2];
    for tokens in TOKENS {
        for (inputs, outputs) in PROJECTIONS {
            if outputs > 10_000 && tokens > HEAD_ROWS {
                continue;
            }
            let cases = [
                ("forward ", Layout::Nt, [tokens, outputs, inputs]),
                ("backward", Layout::Nn, [tokens, inputs, outputs]),
                ("weight  ", Layout::Tn, [outputs, inputs, tokens]),
            ];
            for (name, layout, shape) in cases {
                let [m, n, k] = shape;
                let name = format!("{name} {m:5} x {n:5} x {k:5}");
                if !name.contains(&filter) {
                    continue;
                }
                let [own, other] = measure(layout, shape, repetitions);
                let rate = |seconds: f64| 2e-9 * (m * n * k) as f64 / seconds;
                println!(
                    "{name}  engine {:6.1}  gemm {:6.1} GFLOP/s  ratio {:.2}",
                    rate(own),
                    rate(other),
                    other / own
                );
                totals[0] += own;
                totals[1] += other;
            }
        }
    }
    let [own, other] = totals;
    println!(
        "in sum engine {:.1} ms, gemm {:.1} ms, ratio {:.2}",
        own * 1e3,
        other * 1e3,
        other / own
    );
}

/// Median seconds of the engine's product and of the crate's.
fn measure(layout: Layout, shape: [usize; 3], repetitions: usize) -> [f64; 2] {
    let [m, n, k] = shape;
    let values = |count: usize| -> Vec<f32> {
        (0..count).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect()
    };
    let (a, b) = (values(m * k), values(k * n));
    let (mut own, mut other) = (vec![0.0; m * n], vec![0.0; m * n]);
    let mut seconds = [Vec::new(), Vec::new()];
    for repetition in 0..=repetitions {
        let began = Instant::now();
        product(layout, shape, &a, &b, &mut own);
        let taken = began.elapsed().as_secs_f64();
        let began = Instant::now();
        crate_product(layout, shape, &a, &b, &mut other);
        // The first time pays for memory and threads.
        if repetition > 0 {
            seconds[0].push(taken);
            seconds[1].push(began.elapsed().as_secs_f64());
        }
    }
    let greatest = other.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (own, other) in own.iter().zip(&other) {
        assert!((own - other).abs() <= 1e-4 * greatest, "the two products differ: {own} {other}");
    }
    seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    })
}

#[expect(unsafe_code, reason = "the crate takes pointers")]
fn crate_product(layout: Layout, [m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    let [a_row, a_column] = if layout == Layout::Tn { [1, m] } else { [k, 1] };
    let [b_row, b_column] = if layout == Layout::Nt { [1, k] } else { [n, 1] };
    let stride = |stride: usize| stride as isize;
    // SAFETY: strides and sizes are those of the slices, whose lengths the engine's product has
    // checked. The crate asks the CPU for its instructions.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride(n),
            false,
            a.as_ptr(),
            stride(a_column),
            stride(a_row),
            b.as_ptr(),
            stride(b_column),
            stride(b_row),
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}
