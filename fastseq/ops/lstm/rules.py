"""The rules by which ``auto`` chooses the backend of ``lstm``.

A ratio is the time of nn.LSTM over the time of the row's backend, measured by ``fastseq bench`` on a Xeon (Emerald
Rapids, AVX-512, no AMX) and an EPYC (Zen 4) with 1 and 2 threads, the rows about AVX2 and AMX on a Xeon (Sapphire
Rapids, lowered to AVX2). Rows without ``one_thread`` or ``several_threads`` hold for any number
of threads. It covers the cases of the evidence files and similar ones.
"""

from fastseq.dispatch import Rule
from fastseq.ops.lstm.predicates import (
    at_least_20_steps,
    at_least_50_steps,
    at_least_200_steps,
    at_most_2_steps,
    at_most_4_sequences,
    at_most_8_sequences,
    at_most_16_sequences,
    at_most_32_sequences,
    at_most_40_rows,
    at_most_64_sequences,
    at_most_160_rows,
    autocast,
    avx512,
    avx512_bf16,
    bfloat16,
    eager,
    float16,
    float32,
    float32_or_bfloat16,
    float32_or_float16,
    float32_or_float64,
    float64,
    forward_mode,
    four_sequences,
    fused_under_autocast,
    hidden_size_193_to_1024,
    hidden_size_over_192,
    hidden_size_over_256,
    hidden_size_over_512,
    hidden_size_to_128,
    hidden_size_to_256,
    hidden_size_to_512,
    hidden_values_to_1024,
    hidden_values_to_2048,
    inference,
    matrix_unit,
    modelled_as_faster_on_gpu,
    no_matrix_unit,
    on_cpu,
    on_cuda,
    one_input_column,
    one_layer,
    one_sequence,
    one_step,
    one_thread,
    over_4_sequences,
    over_20_rows,
    over_32_sequences,
    padded,
    partial_vectors,
    projected,
    returns_cell_states,
    several_sequences,
    several_steps,
    several_threads,
    small_weights,
    subclass,
    traced,
    training,
    two_to_4_sequences,
    under_vmap,
    variable_lengths,
    without_avx512,
    x86,
)

AVX2 = "benchmarks/results/grid-xeon-avx2-1thread.json"
SSE = "benchmarks/results/grid-xeon-baseline-1thread.json"
AVX512 = "benchmarks/results/grid-xeon-avx512-1thread.json"
AMX = "benchmarks/results/grid-xeon-amx-1thread.json"
AMX_2 = "benchmarks/results/grid-xeon-amx-2threads.json"
GRIDS = f"{AVX2}, {AVX512}, {AMX}"
STEPS_AVX2 = f"benchmarks/results/steps-xeon-avx2-1thread.json, {GRIDS}"
STEPS_AMX = f"benchmarks/results/steps-xeon-amx-1thread.json, {AMX}"
PROJECTION_AMX = "benchmarks/results/projection-xeon-amx-1thread.json"
PROJECTION_AVX2 = "benchmarks/results/projection-xeon-avx2-1thread.json"
PROJECTION_2 = "benchmarks/results/projection-xeon-amx-2threads.json"
PROJECTIONS = f"{PROJECTION_AMX}, {PROJECTION_AVX2}, {PROJECTION_2}"
XEON_AND_ZEN4 = "benchmarks/results/cpu-xeon-1thread.json, benchmarks/results/cpu-zen4-1thread.json"
PADDED = (on_cpu, eager, padded)
FLOAT32_AVX512 = (*PADDED, float32, avx512)
BFLOAT16_AMX = (*PADDED, bfloat16, matrix_unit)
PROJECTED = (on_cpu, eager, projected)
PROJECTED_AMX = (*PROJECTED, bfloat16, matrix_unit)

RULES = (
    Rule("torch", (subclass,), "a subclass of torch.Tensor, which may redefine torch's operators"),
    Rule("reference", (forward_mode,), "forward-mode derivatives: torch has none for oneDNN and cuDNN"),
    Rule("native", (returns_cell_states,), "oneDNN and cuDNN do not return the cell states of every step"),
    Rule("native", (traced,), "one opaque operator: the graph stays whole, T and B stay dynamic"),
    Rule("native", (under_vmap,), "under torch.func.vmap the samples are folded into the batch"),
    Rule(
        "torch",
        (*PROJECTED, float32_or_float64, training, one_step),
        "a single step with a projection in training: native packs the weights first, 0.6 to 0.9 times as fast",
        PROJECTIONS,
    ),
    Rule(
        "torch",
        (*PROJECTED_AMX, training, one_step),
        "a single step with a projection in training, by AMX: native is 0.6 to 1.1 times as fast",
        f"{PROJECTION_AMX}, {PROJECTION_2}",
    ),
    Rule(
        "torch",
        (*PROJECTED, float32, several_threads, inference, one_step, over_32_sequences),
        "a single step of many sequences on several threads: native is 0.89 times as fast with a projection",
        PROJECTION_2,
    ),
    Rule(
        "native",
        (*PROJECTED, float64, training, at_most_8_sequences),
        "a projection, up to 8 sequences in float64: native is 1.0 to 2.6 times as fast in training",
        f"{PROJECTION_AMX}, {PROJECTION_AVX2}",
    ),
    Rule(
        "native",
        (*PROJECTED, float64, inference, several_steps, hidden_values_to_1024),
        "a projection, few sequences in float64: native is 0.96 to 1.5 times as fast",
        f"{PROJECTION_AMX}, {PROJECTION_AVX2}",
    ),
    Rule(
        "torch",
        (*PROJECTED, float64),
        "a projection of many sequences in float64, op by op: native is 0.7 to 1.1 times as fast",
        f"{PROJECTION_AMX}, {PROJECTION_AVX2}",
    ),
    Rule(
        "native",
        (*PROJECTED_AMX, hidden_size_to_128),
        "a projection of up to 128 hidden units: native is 1.1 to 4 times as fast as torch op by op with AMX",
        f"{PROJECTION_AMX}, {PROJECTION_2}",
    ),
    Rule(
        "native",
        (*PROJECTED_AMX, hidden_values_to_2048),
        "a projection, few sequences: native is 1.2 to 8 times as fast as torch op by op with AMX",
        f"{PROJECTION_AMX}, {PROJECTION_2}",
    ),
    Rule(
        "native",
        (*PROJECTED_AMX, hidden_size_to_256, at_most_32_sequences, at_least_20_steps),
        "a projection, up to 32 sequences of 256 hidden units: native is 0.98 to 2.3 times as fast as torch with AMX",
        f"{PROJECTION_AMX}, {PROJECTION_2}",
    ),
    Rule(
        "torch",
        PROJECTED_AMX,
        "a projection of many sequences: torch multiplies bfloat16 by AMX, native is 0.5 to 1.07 times as fast",
        f"{PROJECTION_AMX}, {PROJECTION_2}",
    ),
    Rule(
        "native",
        (*PROJECTED, x86, float32_or_float16),
        "a projection, op by op in torch: native is 0.96 to 17 times as fast",
        PROJECTIONS,
    ),
    Rule(
        "torch",
        (*PADDED, float16, matrix_unit, training, one_step, at_most_16_sequences),
        "a single step in training, op by op: oneDNN multiplies float16 by AMX, native is 0.65 to 1.2 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "torch",
        (*PADDED, bfloat16, without_avx512, training, one_step, one_sequence, small_weights),
        "a single step of one sequence in training, op by op: native is 0.86 to 0.9 times as fast for small weights",
        STEPS_AVX2,
    ),
    Rule(
        "torch",
        (*PADDED, float64, training, one_step),
        "a single step in training, op by op: native is 0.6 to 1.0 times as fast in float64",
        GRIDS,
    ),
    Rule(
        "torch",
        (*PADDED, float64, without_avx512, inference, one_step, one_sequence, one_input_column),
        "a single step of one sequence of single numbers in float64: native is 0.83 (SSE) to 1.0 times as fast (AVX2)",
        f"{SSE}, {AVX2}",
    ),
    Rule(
        "torch",
        (*FLOAT32_AVX512, one_thread, training, at_least_50_steps, partial_vectors),
        "50 steps or more in training, H = 65 to 256, no multiple of 16: native is 0.83 to 0.99 times as fast",
        f"{AVX512}, {AMX}",
    ),
    Rule(
        "torch",
        (*FLOAT32_AVX512, one_thread, inference, four_sequences, at_least_50_steps, partial_vectors, one_layer),
        "four sequences of 50 steps or more, H = 65 to 256, no multiple of 16: native is 0.89 to 0.96 times as fast",
        f"{AVX512}, {AMX}",
    ),
    Rule(
        "torch",
        (
            *PADDED,
            float32,
            avx512,
            one_thread,
            inference,
            one_input_column,
            two_to_4_sequences,
            at_least_200_steps,
            hidden_size_to_256,
        ),
        "200 steps or more of inputs of one number, H to 256, with AVX-512: native is 0.88 times as fast",
        AVX512,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, inference, one_input_column, one_layer),
        "oneDNN does not use AMX for inputs of one number: native is 1.2 to 1.9 times as fast",
        AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, inference, hidden_values_to_1024),
        "oneDNN's AMX gains little from several threads in small steps: native is 1.04 to 5 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, inference, partial_vectors, hidden_size_to_128),
        "several threads, H = 65 to 128, no multiple of 16: native is 1.2 to 3 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, inference, at_most_8_sequences, one_input_column),
        "several threads, inputs of one number: native is 1.1 to 5 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, training, at_most_8_sequences),
        "few sequences in training on several threads: native is 1.1 to 7 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, training, at_most_64_sequences, hidden_size_to_128),
        "narrow layers in training on several threads: native is 1.1 to 1.5 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, several_threads, training, at_most_16_sequences, hidden_size_over_512),
        "wide layers in training on several threads: native is 1.2 times as fast",
        AMX_2,
    ),
    Rule(
        "torch",
        (*BFLOAT16_AMX, inference, several_sequences, over_20_rows, hidden_size_to_256),
        "oneDNN multiplies bfloat16 by AMX: native is 0.3 to 0.9 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "torch",
        (*BFLOAT16_AMX, inference, one_sequence, at_least_50_steps, hidden_size_to_512),
        "oneDNN multiplies bfloat16 by AMX: native is 0.75 to 0.96 times as fast over 50 steps or more",
        AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, at_most_8_sequences, at_most_2_steps),
        "one or two steps: packing the weights takes longer than AMX multiplies; native is 1.2 to 3.2 times as fast",
        AMX,
    ),
    Rule(
        "native",
        (on_cpu, eager, float16),
        "torch has no float16 kernel on CPU and runs op by op: native is 1.2 to 29 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "torch",
        (on_cpu, eager, fused_under_autocast, training, bfloat16, at_most_2_steps, over_4_sequences),
        "one or two steps of many sequences in a loop under autocast: native is 0.84 to 0.96 times as fast (Zen 4)",
    ),
    Rule(
        "native",
        (on_cpu, eager, float64, at_most_4_sequences),
        "torch has no float64 kernel on CPU and runs op by op: native is 1.1 to 3.7 times as fast for few sequences",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cpu, eager, float64, at_most_8_sequences, several_steps),
        "up to 8 sequences in float64, op by op in torch: native is 1.0 to 2.3 times as fast",
        GRIDS,
    ),
    Rule(
        "native",
        (on_cpu, eager, variable_lengths, float32_or_bfloat16),
        "variable lengths, where torch runs op by op: native is 1.3 to 3.9 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cpu, eager, at_most_4_sequences, float32_or_bfloat16),
        "few sequences: native reads the weights without packing them, 1.1 to 3.4 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "torch",
        (*FLOAT32_AVX512, several_threads, inference, one_step, over_32_sequences),
        "a single step of many sequences on several threads: packing the weights costs native more, 0.93 times as fast",
        AMX_2,
    ),
    Rule(
        "native",
        (on_cpu, eager, float32, avx512),
        "products and cell fused in registers: native is 1.0 to 1.5 times as fast",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cpu, eager, bfloat16, without_avx512),
        "torch has no bfloat16 LSTM without AVX-512 and runs op by op: native is 1.3 to 35 times as fast",
        AVX2,
    ),
    Rule(
        "native",
        (on_cpu, eager, float32, without_avx512),
        "products and cell fused in registers: native is 0.95 to 5 times as fast with AVX2 or SSE, 1.35 in the mean",
        AVX2,
    ),
    Rule(
        "torch",
        (on_cpu, eager, bfloat16, avx512_bf16, inference),
        "inference with AVX-512's bfloat16 dot product: native is 0.97 to 1.04 times as fast (Zen 4)",
        "benchmarks/results/cpu-zen4-1thread.json",
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, at_most_8_sequences, hidden_size_over_256),
        "wide layers, few sequences: reading the weights takes longer than AMX multiplies: native is 1.2 to 1.5 times "
        "as fast",
        STEPS_AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, at_most_8_sequences, hidden_size_over_192, at_most_160_rows),
        "few sequences, up to 160 steps of all in training: native is 1.05 to 1.3 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, at_most_40_rows),
        "up to 40 steps of all sequences in training: native is 1.1 to 1.4 times as fast",
        STEPS_AMX,
    ),
    Rule(
        "native",
        (*BFLOAT16_AMX, training, one_step, hidden_size_over_512),
        "a single step of a wide layer in training: native is 1.2 times as fast",
        AMX,
    ),
    Rule(
        "native",
        (on_cpu, eager, bfloat16, avx512, no_matrix_unit),
        "without a matrix unit: native is 1.4 to 2.0 times as fast (Xeon), training on Zen 4 0.97 to 2.2 times",
        XEON_AND_ZEN4,
    ),
    Rule(
        "native",
        (on_cuda, eager, variable_lengths, modelled_as_faster_on_gpu),
        "not measured yet: variable lengths, for which cuDNN launches kernels step by step",
    ),
    Rule(
        "native",
        (on_cuda, eager, float32_or_bfloat16, hidden_size_193_to_1024, modelled_as_faster_on_gpu),
        "not measured yet: cuDNN launches two kernels a step here, unless float16 or hidden_size <= 192",
    ),
    Rule("torch", (), "oneDNN or cuDNN: no kernel of fastseq was measured faster here"),
    Rule(
        "native",
        (on_cpu, autocast),
        "oneDNN, which nn.LSTM calls under autocast, has no LSTM in this dtype on this processor",
    ),
    Rule("triton", (on_cuda,), "the torch backend refuses this call; not measured yet"),
    Rule("reference", (), "no other backend serves this call"),
)
