-- Count the batches that have not ended, and their lines.
-- KEYS: batches that have not ended
-- ARGV: prefix of batches
-- Returns {batches that a gateway works on, batches that wait, lines, lines with a result, creation of the oldest in unix
-- seconds, or ''}. A batch whose lines cannot be read counts without them.
local working, waiting, lines, done, first = 0, 0, 0, 0, ''
if redis.call('TYPE', KEYS[1]).ok ~= 'zset' then return {working, waiting, lines, done, first} end
local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #found, 2 do
  local batch = ARGV[1] .. found[i]
  if redis.call('TYPE', batch).ok == 'hash' then
    if redis.call('EXISTS', batch .. ':lease') == 1 then working = working + 1 else waiting = waiting + 1 end
    local counts = redis.call('HMGET', batch, 'total', 'completed', 'failed', 'expired')
    lines = lines + (tonumber(counts[1] or 0) or 0)
    for n = 2, 4 do done = done + (tonumber(counts[n] or 0) or 0) end
    if first == '' then first = found[i + 1] end
  end
end
return {working, waiting, lines, done, first}
