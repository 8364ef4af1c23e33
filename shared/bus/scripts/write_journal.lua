-- Write tokens at their place in journals; 4 bytes a token. A request without a record is passed over.
-- KEYS: shards, (record, journal, logprobs)...
-- ARGV: fence, (index, tokens, Begin or empty, number of logprobs, logprobs...)...
-- Returns the places, from 1, of the writes that would have left a hole and were not made.
-- requires: fence
-- requires: typed
local refused = {}
for i = 2, #KEYS, 3 do
  local index, tokens, begin, logprobs = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  at = at + 4
  if is_a('hash', KEYS[i]) then
    if not is_a('string', KEYS[i + 1]) then redis.call('UNLINK', KEYS[i + 1]) end
    if not is_a('list', KEYS[i + 2]) then redis.call('UNLINK', KEYS[i + 2]) end
    local kept = logprobs > 0 and redis.call('LLEN', KEYS[i + 2]) or index
    if redis.call('STRLEN', KEYS[i + 1]) < 4 * index or kept < index then
      refused[#refused + 1] = (i + 1) / 3
    else
      redis.call('SETRANGE', KEYS[i + 1], 4 * index, tokens)
      for n = kept - index, logprobs - 1 do redis.call('RPUSH', KEYS[i + 2], ARGV[at + n]) end
      if begin ~= '' then redis.call('HSET', KEYS[i], 'begin', begin) end
    end
  end
  at = at + logprobs
end
return refused
