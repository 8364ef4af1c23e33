"""Mixture-of-experts blocks: which path computes what, by the rows N of a step and by weight format, and why.

For the model's sizes: pools of 64 text and 64 vision experts and 6 experts a token, so 6 N pairs over 128 experts.
Times are microseconds a layer on an H200; docs/notebook/engine.md has the experiment behind each threshold.
"Products" are a layer's routed experts with router and sort.

    part      weights    rows N   path                                      why, as measured
    --------  ---------  -------  ----------------------------------------  ------------------------------------------
    router    float32    1-16     scores in the launch of residual sum and  one launch less: 2 at 8 rows, 5 at 1 with
                                  norm: add_norm_scores                     bf16; the matrix units gain nothing here
                         17-256   three exact bf16 products and the choice  17.6 to 7.9 at 128 rows, 32 to 12.5 at 256,
                                  in one launch: router                     where the plain units did it
                         257-     the same products by the library, then a  21.1 to 11.7 at 512 rows, 33.9 to 13.0 at
                                  launch for the choice: router             1,024; 4.8 to 1.9 ms of a prompt of 8,192
    sort      any        1-2      none, each pair is a tile, and gate_up    36 to 22.5 without the sort; 4.8 less with
                                  chooses its expert: experts               the choice in gate_up (int4)
                         3-341    one program: sort                         1.0 to 1.6 less up to 128 rows
                         342-     counting sort in three launches: sort     7.2 instead of 12.8 at 1,024 rows
    products  bf16       1-682    rows gathered by pointers, tiles of 8 to  bound by bytes of weights: 32 at 1 row,
                                  128 rows: experts, tiles                  309 at 32, 353 at 256
                         683-     persistent grouped GEMM, all operands by  597 and 661 TFLOP/s instead of 540: 2,434
                                  TMA: grouped, grouped_plain               to 1,930 at 8,192 rows
              int4 int8  1-682    as bf16, the weight as left operand,      12 at 1 row, 90 at 32, 153 at 256, 232 at
                         (-1365)  dequantised in registers                  512 (int4)
                         683-     persistent grouped GEMM, activations by   int4 as fast as bf16 (1,934 at 8,192 rows)
                         (1366-)  TMA, the weight dequantised in            without a bf16 copy of the pools; 415 to 314
                                  registers: grouped, grouped_quantized     at 768 rows, 451 to 320 at 1,024 (captured)
    shared    any        1-2048   on a second stream beside the routed      6 layers 2,299 to 2,161 at 128 rows; a
    expert                        experts: moe                              block 540 to 518 at 1,024, 949 to 939 at
                                                                            2,048
                         2049-    before them on the same stream: moe       each product fills the device alone

Rows in brackets are those of int8. The grouped GEMMs begin at 32 rows an expert (int8: 64), on average over both pools.
They also need spare memory for the rows in order (memory_budget), rows aligned to 16 bytes for TMA, and a power of two
of experts. Where one of these is missing, any number of rows takes the path of few: see `grouped.uses_grouped_gemm`.
"""
