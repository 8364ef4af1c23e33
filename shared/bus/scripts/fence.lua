-- Prelude of every fenced write: refuse unless each named shard still has the epoch (fencing token) and owner given.
-- The ARGV of the script itself start at `at`.
-- KEYS: shards, ...
-- ARGV: number of shards, (shard, "epoch owner")..., ...
local at = 2 * ARGV[1] + 2
for i = 2, at - 1, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) ~= ARGV[i + 1] then
    return redis.error_reply('FENCED shard ' .. ARGV[i])
  end
end
