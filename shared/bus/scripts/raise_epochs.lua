-- Raise the epochs (fencing tokens) of the requests whose entries the consumer owns: it becomes their owner.
-- KEYS: stream, record...
-- ARGV: consumer group, consumer, entry id...
-- Returns {epoch...}: 0 for a request without a record, -1 for an entry that the consumer does not own.
-- requires: entries
local epochs = {}
for i = 3, #ARGV do
  local record = KEYS[i - 1]
  if not owns(ARGV[i]) then
    epochs[#epochs + 1] = -1
  elseif redis.call('EXISTS', record) == 0 then
    epochs[#epochs + 1] = 0
  else
    epochs[#epochs + 1] = redis.call('HINCRBY', record, 'epoch', 1)
  end
end
return epochs
